"""`draftsmith doctor`: is a draft, a head or a target what it should be? One finding per check, with its mend."""
