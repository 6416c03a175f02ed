"""The closed form: from the update of a classifier's head to counts, labels, features and peers."""
