"""The vocabulary every other room speaks."""
