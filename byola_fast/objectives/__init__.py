"""What training minimises: BYOL and contrastive learners around an encoder."""
