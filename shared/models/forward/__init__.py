"""What does a model do in a forward pass: its parts, their widths, its attention, its logits, which rows share one?"""
