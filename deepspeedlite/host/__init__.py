"""What programs around a training ask and tell: the processors that they may use; sizes, times and tables as text."""
