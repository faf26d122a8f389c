"""Layer tars."""
