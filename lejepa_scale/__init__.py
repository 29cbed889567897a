"""lejepa_scale: pre-train image foundation encoders with LeJEPA, from a laptop to a cluster."""

__version__ = "0.1.0"
