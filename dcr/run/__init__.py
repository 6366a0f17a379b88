"""A run: the store, what is trained, asked and read in it; a user's own data."""
