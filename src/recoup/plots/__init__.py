"""Every matplotlib picture that is not the report's own, and their one palette."""
