"""Layer norm and RMS norm by ranges: every sample's features by statistics of their own, forward and backward."""
