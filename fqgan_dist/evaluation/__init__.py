"""What is measured: Inception features and moments, FID, IS, precision and recall, PSNR, SSIM, codebook use."""
