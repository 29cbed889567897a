"""`lejepa <command>`: one thin file per command over the library. It words and writes files;
nothing is computed here."""
