"""What trainings of recipes have in common, whatever their task."""
