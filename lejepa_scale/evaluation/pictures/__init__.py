"""What a picture of an encoder shows, panel by panel, and the page that holds them. picture.py is how they are called."""
