"""The enhancement of ROG (USENIX Security 2023): a conditional generator and super-resolution."""
