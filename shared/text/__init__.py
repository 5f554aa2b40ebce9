"""What does a text of people and strangers hold: another encoding, a JSON key twice, characters that steer a screen?"""
