"""Stand-ins for what runs a recipe elsewhere: GitHub's runner."""
