"""What the commands do beyond one call into the library."""
