"""What the system costs at the size of a hospital group: a calculator over measured stage costs, and a simulated day."""
