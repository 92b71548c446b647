"""Settings of NIO for a model and its data, chosen by short trainings and judged by long ones."""
