"""ROG's enhancement (USENIX Security 2023): a class-conditional generator and super-resolution."""
