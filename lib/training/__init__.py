"""What an optimizer step needs."""
