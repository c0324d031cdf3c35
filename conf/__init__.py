"""What a run can be: dataclasses that state every field and rule, and the YAML groups that fill them."""
