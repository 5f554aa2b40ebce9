"""Audits of a cache: is it what the teacher says, and what does its capture leave out."""
