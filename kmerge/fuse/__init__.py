"""Function space: one trunk from networks that were trained apart, fitted to what they compute."""
