"""LightNorm on the CPU: emitted passes that read every tensor as seldom as can be."""
