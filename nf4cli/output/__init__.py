"""What a finished output says of itself: manifest, model card, findings, inspection."""
