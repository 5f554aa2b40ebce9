"""How do sampled answers of the models differ, beside the teacher's, on the same prompts?"""
