"""What is asked before an engine is built, and changes nothing: do model, optimizer and ranks fit what is to be done?

`usable` asks it of one rank's model, `elementwise` of its optimizer, `verify_model` of all ranks together.
"""
