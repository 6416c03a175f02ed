"""What the attacker sees, what it is told or assumes about its peers, and what an attack requires of both."""
