"""Functions in several forms that give the same bits; a function chooses its form by the device."""
