"""Image files in; trainer-ready tables, reports and review pages out."""
