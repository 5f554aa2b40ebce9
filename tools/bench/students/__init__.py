"""What does a student learn? Trainings from several seeds, evaluated and compared with intervals."""
