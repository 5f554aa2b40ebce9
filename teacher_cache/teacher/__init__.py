"""Who is the teacher, and what does it make that is there already?"""
