"""LightningModules: thin shells over `rotpruner`."""
