"""Drop-ins: each file replaces one function or class of the ground floor."""
