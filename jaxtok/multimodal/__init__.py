"""Systems that join text and image."""
