"""nn.Modules only."""
