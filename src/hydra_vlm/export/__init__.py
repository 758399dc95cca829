"""A trained adapter in the forms that other programs read; every one is loaded again and compared before it appears."""
