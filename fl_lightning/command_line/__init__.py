"""What stands between a user's words and the classes that they name: readable errors, checks, former names."""
