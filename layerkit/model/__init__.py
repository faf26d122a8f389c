"""Values and pure rules; nothing here reads or writes anything."""
