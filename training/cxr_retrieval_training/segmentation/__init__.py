"""The networks that find the lungs: their training, their measures, and films cut to what they find."""
