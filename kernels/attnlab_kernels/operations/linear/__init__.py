"""Linear attention: keys and values fold into one state of fixed size."""
