"""Around a run: many of them at once, and which of them to keep. Training never imports this room."""
