"""What a gradient goes through between backward and the optimizer; it leaves with the reducer that won."""
