"""LSHLinear: a drop-in for a huge nn.Linear output layer that trains only the neurons that matter."""
