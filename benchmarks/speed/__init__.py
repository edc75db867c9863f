"""What a step, an operator, a prediction takes."""
