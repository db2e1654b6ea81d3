"""What leaves the lab: tables, arrays, pictures, one offline report and one zip that reads back."""
