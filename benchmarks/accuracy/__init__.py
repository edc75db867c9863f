"""What is learnt, in how many steps or seconds, and what is found."""
