"""What is measured, how, and the gate that comes before every number."""
