"""What owners keep and attackers get, by recipe: see README.md beside this file."""
