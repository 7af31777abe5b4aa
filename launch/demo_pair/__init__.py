"""How the embedded demo pair is made and widened."""
