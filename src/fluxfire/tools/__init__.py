"""Commands of the `fluxfire` command line that need no model of their own."""
