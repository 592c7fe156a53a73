"""How much memory the model states need (`estimate`), and what fits a machine (`fit`, `machine`)."""
